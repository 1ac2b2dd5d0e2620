"""Robots: ROS 2 bridge, simulated twin, safety gate, cameras and deployment."""
