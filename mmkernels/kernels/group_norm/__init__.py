"""GroupNorm over channels-last pictures, with SiLU behind it or without: statistics, application, backward."""
