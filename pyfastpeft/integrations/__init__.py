"""One module for each outside project, imported only when it is asked for."""
