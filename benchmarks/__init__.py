"""Load generators and side-by-side measurements; `dspark bench` is the part for users."""
