"""The lab: experiments over many runs, and the report that is a pure function of their records."""
