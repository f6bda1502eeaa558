"""What every integration (Lightning, accelerate) needs beside its framework: settings, job, a spread model."""
