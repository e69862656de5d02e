"""HTTP in, HTTP out: an OpenAI-compatible front of `dspark.engine`. No tensor ever."""
