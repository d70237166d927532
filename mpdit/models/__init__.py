"""The networks. They read like their papers and import no process group."""
