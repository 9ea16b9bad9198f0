package hypervisor

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
)

// MaxHookEvent is the most octets of a hook event; the longest list of names fits.
const MaxHookEvent = 16 << 10

// maxExtra bounds libvirt's own words in an event.
const maxExtra = 256

// HookLife is how long libvirt's hook waits for an answer. An event that is older is not libvirt's present any more.
const HookLife = time.Second

// The operations with which libvirt calls its hook for QEMU domains. See libvirt's documentation of hooks.
const (
	OpPrepare   = "prepare"   // a start begins; a refusal fails it
	OpStart     = "start"     // the process is about to be made; an automatic CID is known from here on
	OpStarted   = "started"   // the process runs
	OpStopped   = "stopped"   // it runs no more
	OpRelease   = "release"   // all it had is released
	OpMigrate   = "migrate"   // an incoming migration begins; prepare follows
	OpRestore   = "restore"   // a saved image is about to be read; prepare follows
	OpReconnect = "reconnect" // libvirt was restarted and found the domain running; a failure here would kill it
	OpAttach    = "attach"    // a process that libvirt did not start is taken in
)

var operations = []string{OpPrepare, OpStart, OpStarted, OpStopped, OpRelease, OpMigrate, OpRestore, OpReconnect, OpAttach}

// IsOperation says whether libvirt's hook knows this operation.
func IsOperation(op string) bool { return slices.Contains(operations, op) }

// HookEvent is what libvirt's hook tells the broker about one domain with our metadata.
type HookEvent struct {
	Operation    string   `json:"operation"`
	Suboperation string   `json:"suboperation"`
	Extra        string   `json:"extra"`
	UUID         string   `json:"uuid"`
	Name         string   `json:"name"`
	CID          uint32   `json:"cid,omitzero"`     // 0: none yet
	Tier         string   `json:"tier,omitzero"`    // what the metadata claims
	Offered      []string `json:"offered,omitzero"` // key names in the metadata
	PID          int      `json:"pid,omitzero"`     // at started and reconnect, where it could be read
	At           int64    `json:"at,omitzero"`      // BootTime when libvirt called, in nanoseconds; 0: not known
}

// HookRefusal is the body of the broker's answer that refuses an event, with HTTP status 403.
type HookRefusal struct {
	Code   string `json:"code"`
	Reason string `json:"reason"`
}

// ParseHookEvent reads an event as the hook sends it, strictly.
func ParseHookEvent(data []byte) (HookEvent, error) {
	if len(data) > MaxHookEvent {
		return HookEvent{}, fmt.Errorf("reading a hook event: more than %d octets", MaxHookEvent)
	}
	var e HookEvent
	if err := json.Unmarshal(data, &e, json.RejectUnknownMembers(true)); err != nil {
		return HookEvent{}, fmt.Errorf("reading a hook event: %w", err)
	}
	if err := e.check(); err != nil {
		return HookEvent{}, fmt.Errorf("reading a hook event: %w", err)
	}
	return e, nil
}

// Marshal returns the event as ParseHookEvent reads it, after the same checks.
func (e HookEvent) Marshal() ([]byte, error) {
	if err := e.check(); err != nil {
		return nil, fmt.Errorf("writing a hook event: %w", err)
	}
	data, err := json.Marshal(e)
	if err == nil && len(data) > MaxHookEvent {
		err = fmt.Errorf("more than %d octets", MaxHookEvent)
	}
	if err != nil {
		return nil, fmt.Errorf("writing a hook event: %w", err)
	}
	return data, nil
}

// Late says that the hook has given up on this event by now, a BootTime: libvirt has moved on, and what came after may have
// been handled before it.
func (e HookEvent) Late(now time.Duration) bool {
	return e.At != 0 && now-time.Duration(e.At) > HookLife
}

// Domain returns what the event says of its domain.
func (e HookEvent) Domain() Domain {
	return Domain{
		UUID: e.UUID, Name: e.Name, CID: e.CID, Tier: e.Tier, Offered: slices.Clone(e.Offered), Metadata: true,
		Running: e.Operation == OpStarted || e.Operation == OpReconnect, PID: e.PID,
	}
}

func (e HookEvent) check() error {
	if !IsOperation(e.Operation) {
		return fmt.Errorf("unknown operation %s", quote(e.Operation))
	}
	if len(e.Suboperation) > maxExtra || len(e.Extra) > maxExtra {
		return fmt.Errorf("a suboperation or extra argument of more than %d octets", maxExtra)
	}
	if canonical, err := ParseUUID(e.UUID); err != nil {
		return err
	} else if canonical != e.UUID {
		return fmt.Errorf("the UUID %s is not in lower case", quote(e.UUID))
	}
	if e.PID < 0 || e.PID > maxPID || e.At < 0 {
		return errors.New("a process number or time out of range")
	}
	if e.CID != 0 {
		if err := checkCID(uint64(e.CID)); err != nil {
			return err
		}
	}
	if err := checkName(e.Name); err != nil {
		return err
	}
	if err := checkTier(e.Tier); err != nil {
		return err
	}
	return checkOffered(e.Offered)
}
