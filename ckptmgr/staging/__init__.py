"""The process boundary: shared host memory, tickets and the control socket."""
