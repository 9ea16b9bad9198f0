package seal

import (
	"errors"
	"fmt"
	"strings"
)

// What can be wrong with a realm file. Their texts, and those of every error of Parse, hold nothing of the file.
var (
	// ErrTruncated: the file ends before its checksum.
	ErrTruncated = errors.New("realm file is truncated: it does not end in its checksum; restore it from a copy")
	// ErrCorrupt: the file does not match its checksum, or is no realm file at all.
	ErrCorrupt = errors.New("realm file is damaged or was edited: its content does not match its checksum; restore it from a copy")
	// ErrEdited: the file matches its checksum, but not what was authenticated when the realm was last changed.
	ErrEdited = errors.New("realm file was edited: a slot opens it, but its content is not what keybroker wrote; restore it from a copy")
	// ErrNewer: the file is of a version, or needs a number of kinds, that this release does not know.
	ErrNewer = errors.New("realm file needs a newer keybroker")
	// ErrOtherRealm: the file, or what it opens to, is not the realm that was expected.
	ErrOtherRealm = errors.New("another realm")
	// ErrNoSlot: no slot opened. Unless it stands alone a *NoSlotError wraps it, with the reason of each slot.
	ErrNoSlot = errors.New("no slot opened")
	// ErrSlotNotFound: no slot has this id.
	ErrSlotNotFound = errors.New("no slot has this id")
	// ErrUnknownKind: this release, or this command, knows no protector of this kind.
	ErrUnknownKind = errors.New("slots of this kind need a newer keybroker")
	// ErrExists: there is a realm file already.
	ErrExists = errors.New("there is a realm file already")
	// ErrBusy: another process is changing the realm file.
	ErrBusy = errors.New("another command is changing the realm file")
	// ErrSlotEdited: the key of a slot was recovered, but the share is not wrapped under it and these parameters.
	ErrSlotEdited = errors.New("slot was edited: its key was recovered, and does not open it")
)

// A SlotError is why one slot did not open.
type SlotError struct {
	Slot SlotID
	Kind string
	Err  error
}

// Error names the slot and the reason, in one line.
func (e *SlotError) Error() string { return fmt.Sprintf("slot %s (%s): %v", e.Slot, e.Kind, e.Err) }

// Unwrap returns the reason.
func (e *SlotError) Unwrap() error { return e.Err }

// A NoSlotError is ErrNoSlot together with the reason of every slot that was tried, in that order.
type NoSlotError struct {
	Slots []*SlotError
}

// Error gives all reasons in one line.
func (e *NoSlotError) Error() string {
	if len(e.Slots) == 0 {
		return ErrNoSlot.Error() + ": none was tried"
	}
	reasons := make([]string, len(e.Slots))
	for i, s := range e.Slots {
		reasons[i] = s.Error()
	}
	return ErrNoSlot.Error() + ": " + strings.Join(reasons, "; ")
}

// Unwrap returns ErrNoSlot and the reasons.
func (e *NoSlotError) Unwrap() []error {
	errs := []error{ErrNoSlot}
	for _, s := range e.Slots {
		errs = append(errs, s)
	}
	return errs
}
