"""What a driver must be, and what travels between the application, its drivers and its workers."""
