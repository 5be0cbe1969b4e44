"""Weight files and their way to the actors, against what others send."""
