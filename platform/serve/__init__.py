"""Serving: a plain pipeline and, around it, a Ray Serve application. Only `app` and `launch` import ray."""
