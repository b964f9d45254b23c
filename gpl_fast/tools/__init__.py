"""What the command line runs beside the demo: the environment's report, measurements, floors."""
