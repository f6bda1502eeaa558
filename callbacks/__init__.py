"""Lightning callbacks of skippipe: recovery, balance and monitoring (none yet)."""
