"""The `lambdapo` command."""
