//! The pod's network: a netns, CNI, and the tap that joins it to the machine.
