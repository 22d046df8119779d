"""One file a backend; each is imported when its name is asked for."""
