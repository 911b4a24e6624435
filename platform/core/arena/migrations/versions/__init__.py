"""One file a change of the tables. What has been released is never edited."""
