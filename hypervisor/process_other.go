//go:build !linux

package hypervisor

import (
	"errors"
	"time"
)

const maxPID = 1 << 22

// ErrOtherProcess says that a process is not the one that runs this domain.
var ErrOtherProcess = errors.New("the process does not run this domain")

// Process is not to be had outside Linux.
type Process struct {
	PID       int
	StartTime uint64
}

// OpenProcess is not supported here.
func OpenProcess(int) (*Process, error) { return nil, errors.ErrUnsupported }

// Alive is never true here.
func (*Process) Alive() bool { return false }

// Done returns nil.
func (*Process) Done() <-chan struct{} { return nil }

// Close does nothing.
func (*Process) Close() error { return nil }

// Boot returns the zero Boot.
func (*Process) Boot(string) Boot { return Boot{} }

// Runs is not supported here.
func (*Process) Runs(string, string) error { return errors.ErrUnsupported }

// Origin is never known here.
func (*Process) Origin() Origin { return OriginUnknown }

// ReadPIDFile is not supported here.
func ReadPIDFile(string) (int, error) { return 0, errors.ErrUnsupported }

// SinceStart is not supported here.
func SinceStart() (time.Duration, error) { return 0, errors.ErrUnsupported }

// BootTime is zero here.
func BootTime() time.Duration { return 0 }
