"""The processes of a job as the driver and the workers see them: how they meet, who stays, what a script does again."""
