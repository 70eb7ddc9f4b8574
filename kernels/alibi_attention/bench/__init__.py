"""What measures attention: its time, its peers and the contract that every back end keeps."""
