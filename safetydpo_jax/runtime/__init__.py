"""Hosts, devices, storage and files: what every command stands on."""
