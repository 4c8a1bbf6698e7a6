"""Population statistics: measured over a data set, put in place of running statistics, verified."""
