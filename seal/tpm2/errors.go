package tpm2

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	gotpm "github.com/google/go-tpm/tpm2"
)

// Why a TPM does not open a slot, or cannot make one.
var (
	// ErrMissing: nothing at the path is a TPM that answers.
	ErrMissing = errors.New("no TPM")
	// ErrOtherTPM: its storage root key is not the one recorded at enrolment: another TPM, or this one was cleared.
	ErrOtherTPM = errors.New("this is another TPM, or it was cleared: its storage root key is not the one that the slot was enrolled with")
	// ErrPCRChanged: a *PCRChangedError says which registers, from what, to what.
	ErrPCRChanged = errors.New("PCRs changed since the slot was enrolled")
	// ErrPolicy: the TPM refuses the policy, and yet all PCRs read as at enrolment.
	ErrPolicy = errors.New("the TPM refuses the slot's policy, although every PCR reads as when it was enrolled")
	// ErrLockout: too many wrong authorisations; the TPM refuses more until its lockout interval has passed.
	ErrLockout = errors.New("the TPM is in dictionary attack lockout: wait, or reset it by tpm2_dictionarylockout --clear-lockout")
	// ErrBusy: the TPM asked again and again to try later, or other programs use up its memory.
	ErrBusy = errors.New("the TPM is busy")
	// ErrOwnerAuth: creating the storage root key needs an empty owner authorisation.
	ErrOwnerAuth = errors.New("the TPM's owner hierarchy has a password or is disabled: keybroker needs it empty (tpm2_changeauth -c owner)")
	// ErrNoBank: the TPM does not measure into the bank or register.
	ErrNoBank = errors.New("the TPM has no such PCR bank or register")
	// ErrParams: the slot's parameters are not such as this package writes.
	ErrParams = errors.New("the slot's parameters are damaged")
	// ErrObject: the TPM is the right one, and does not take the sealed object.
	ErrObject = errors.New("the TPM does not take the slot's sealed object: it is damaged")
)

// A PCRChange is one register that has another value than when the slot was enrolled.
type PCRChange struct {
	PCR      int
	From, To []byte
}

// A PCRChangedError says which registers changed. It is ErrPCRChanged.
type PCRChangedError struct {
	Bank    string
	Changes []PCRChange
}

// Error gives every change, as "PCR 7 (sha256) changed from HEX to HEX".
func (e *PCRChangedError) Error() string {
	lines := make([]string, len(e.Changes))
	for i, c := range e.Changes {
		lines[i] = fmt.Sprintf("PCR %d (%s) changed from %s to %s", c.PCR, e.Bank, hex.EncodeToString(c.From), hex.EncodeToString(c.To))
	}
	return strings.Join(lines, ", ")
}

// Is reports whether target is ErrPCRChanged.
func (e *PCRChangedError) Is(target error) bool { return target == ErrPCRChanged }

// isFull says that the TPM has no room for another object or session.
func isFull(err error) bool {
	return errors.Is(err, gotpm.TPMRCObjectMemory) || errors.Is(err, gotpm.TPMRCSessionMemory) || errors.Is(err, gotpm.TPMRCSessionHandles)
}

// isLater says that the TPM did not execute the command, and wants to be asked again.
func isLater(rc gotpm.TPMRC) bool {
	return rc == gotpm.TPMRCRetry || rc == gotpm.TPMRCYielded || rc == gotpm.TPMRCTesting || rc == gotpm.TPMRCNVRate
}

// explain puts what a user can do about it before a TPM's own error.
func explain(err error) error {
	var rc gotpm.TPMRC
	switch {
	case err == nil:
		return nil
	case errors.Is(err, gotpm.TPMRCLockout):
		return fmt.Errorf("%w (%w)", ErrLockout, err)
	case errors.Is(err, gotpm.TPMRCInitialize):
		return fmt.Errorf("%w that is started: %w", ErrMissing, err)
	case isFull(err), errors.As(err, &rc) && isLater(rc):
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return err
}
