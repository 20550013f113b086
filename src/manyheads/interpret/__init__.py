"""Analyses of attention heads: functions from (model, data) to a result object."""
