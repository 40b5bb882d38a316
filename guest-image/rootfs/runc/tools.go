//go:build tools

// Package tools pins the version of runc that goes into the guest.
package tools

import _ "github.com/opencontainers/runc"
