"""Questions asked of the code. Imported by nobody."""
