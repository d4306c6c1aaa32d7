"""What runs on devices: the loop over chunks, lanes, sharding, memory, hosts."""
