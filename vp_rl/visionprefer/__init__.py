"""VisionPrefer: prompts to images to AI annotations to preference pairs, stage by stage."""
