"""What a scoring pass costs: FLOPs counted beforehand, and time measured part by part."""
