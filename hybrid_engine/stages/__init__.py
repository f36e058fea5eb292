"""The three InstructGPT steps, each a loop over the parts below it (Ouyang et al., 2022,
arXiv:2203.02155).
"""
