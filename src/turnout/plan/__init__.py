"""The planner's place in the house: what a MoE does to network, memory, time and bill. Never imports torch."""
