"""What people run on finished trainings and data sets: pages, figures, exports, conversions."""
