//go:build linux

// Package sink is where a guest puts a key: into a LUKS2 volume that it opens, a kernel keyring, or a file in memory.
//
// What a sink does is decided by the guest's own configuration alone. The disk under a volume belongs to the host, so
// everything on it is read once, checked, and used only as it was understood.
package sink

import (
	"errors"
	"fmt"
)

// Sentinels of what a sink refuses. Match them with errors.Is.
var (
	// ErrHeader: the volume's LUKS2 header is not one that this program would have written, or not as the issuer pins it.
	ErrHeader = errors.New("the volume's header is refused")
	// ErrNotBlank: there is no volume of ours on the device, and what is there is not overwritten.
	ErrNotBlank = errors.New("the device is not blank and holds no volume of ours")
	// ErrNoVolume: the device is blank, and the issuer does not say that it may be formatted.
	ErrNoVolume = errors.New("the device holds no volume and may not be formatted")
	// ErrWrongKey: the key opens none of the volume's keyslots.
	ErrWrongKey = errors.New("the key does not open the volume")
	// ErrOldEpoch: the key is of an earlier epoch than the one that the volume was last opened with.
	ErrOldEpoch = errors.New("the key's epoch is older than the volume's")
	// ErrTaken: a mapping, a file or a key of this name is there already, and was not put there by this agent.
	ErrTaken = errors.New("the place is taken by somebody else")
	// ErrNotInMemory: the file's folder is on a disk.
	ErrNotInMemory = errors.New("the folder is not in memory")
)

// NeedEpochError says that the volume is still of an earlier epoch than the key: with the key of Epoch as well, Rekey moves
// it on.
type NeedEpochError struct {
	Epoch uint32 // the volume's
}

func (e *NeedEpochError) Error() string {
	return fmt.Sprintf("the volume is of epoch %d: its key is needed once more, to let the new one in", e.Epoch)
}

// Key is a key on its way into a sink. It holds the octets in a closure, so that printing a Key shows none of them.
type Key struct {
	Name    string
	Epoch   uint32        // 1 or more
	Octets  func() []byte // the caller wipes what it returns when the sink is done
	Create  bool          // luks: a blank device may be formatted
	Pins    HeaderPins    // luks: what the issuer says of the header
	Subject string        // luks: written into a new volume's token, for people
}

// Result says what became of a key.
type Result struct {
	Opened    bool   // luks: the volume is open with this very key
	Formatted bool   // luks: the device was blank and has a new volume
	Already   bool   // the key was there before, put there by this agent
	Leftover  error  // luks: an earlier epoch's keyslot could not be taken out; the next Put tries again
	ID        string // luks: the volume's UUID
	Place     string // for people: "/dev/vdb as /dev/mapper/data"
}
