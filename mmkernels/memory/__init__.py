"""What a training step costs in memory: modelled by tracing it, without running it on the device."""
