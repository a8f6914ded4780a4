"""Who fills a batch: threads of this process, or threads of several others."""
