"""Hosts, devices, storage and files: what every command is built on."""
