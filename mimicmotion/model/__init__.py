"""The networks: UNet, pose network and the encoders around them."""
