"""Words shared by every part of Lorafleet: errors, settings, generation requests, recipes. No torch, no Ray."""
