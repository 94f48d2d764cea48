"""A web page beside a training: what a cluster says of itself, read only, without anything from elsewhere."""
