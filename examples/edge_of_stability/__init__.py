"""Where training settles: at the edges of stability, by measured curvature."""
