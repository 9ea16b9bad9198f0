//go:build !linux

package derive

import (
	"errors"
	"os"
)

var errLinuxOnly = errors.New("the keyholder runs on Linux only")

// NewPage works on Linux only.
func NewPage() (*os.File, error) { return nil, errLinuxOnly }

// PageKind works on Linux only.
func PageKind(*os.File) (string, error) { return "", errLinuxOnly }

// FillPage works on Linux only.
func FillPage(*os.File, []Master) error { return errLinuxOnly }

// ServeHolder works on Linux only.
func ServeHolder(_, _ int) error { return errLinuxOnly }

func socketPair() (ours, theirs *os.File, err error) { return nil, nil, errLinuxOnly }
