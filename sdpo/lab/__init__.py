"""What the method's assumptions and questions look like, measured: `python -m sdpo.lab`."""
