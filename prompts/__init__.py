"""The prompt suites, and the program that builds those that are not in the repository."""
