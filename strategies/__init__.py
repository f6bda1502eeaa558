"""Lightning strategies of skippipe."""
