"""The routes, one module per noun; each has `add`, which puts its own on an app."""
