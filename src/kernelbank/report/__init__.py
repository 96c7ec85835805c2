"""Run records to tables, curves and figures; nothing here trains."""
