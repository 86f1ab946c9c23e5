"""What a run did, told: as JSON, a page, plots, a model card, and a repo on the Hub.

Takes the figures of a run as a `Record`; gives tables and plots of it, the folder of a pruned model, and
`PruneReport`, the record that `prune` returns and that saves and pushes itself.
"""
