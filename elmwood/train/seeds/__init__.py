"""Seeds from scratch: shapes by name, corpora streamed shard by shard and mixed, and the task that trains one."""
