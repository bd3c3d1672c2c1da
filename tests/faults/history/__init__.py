"""A random history of a real server, judged only from what its clients were told.

`choices` decides from a seed what clients ask and which faults happen; `clients` ask and record every answer;
`disturbances` have the faults happen; `judge` reads the record, and nothing else, for promises that were broken.
"""
