package daemon

import "time"

// Status is what `keybroker status` shows and GET /v1/status answers: everything about the broker but its keys.
type Status struct {
	Version    string         `json:"version"`
	PID        int            `json:"pid"`
	Started    time.Time      `json:"started"`
	Listen     []string       `json:"listen"` // for services: loopback addresses, and the Unix socket
	Realm      RealmStatus    `json:"realm"`
	Policy     PolicyStatus   `json:"policy"`
	Hypervisor LibvirtStatus  `json:"hypervisor"`
	Audit      AuditStatus    `json:"audit"`
	VMs        []VMStatus     `json:"vms"`
	Warnings   []string       `json:"warnings"` // what an admin should mend
	Counters   map[string]int `json:"counters"` // tier 1 answers by code
}

// RealmStatus says which realm this is, and who holds its derivation key.
type RealmStatus struct {
	ID          string       `json:"id"`    // hex; "" while it was never open
	State       string       `json:"state"` // opening, waiting, open or locked
	Why         string       `json:"why,omitzero"`
	Generations int          `json:"generations"`
	Identity    string       `json:"identity"` // the pin for agents
	OpenedBy    string       `json:"opened_by,omitzero"`
	HolderPID   int          `json:"holder_pid,omitzero"`
	HolderIn    string       `json:"holder_in,omitzero"` // memfd_secret, or memfd on old kernels
	Kept        bool         `json:"kept"`               // systemd keeps the page over restarts
	Slots       []SlotStatus `json:"slots"`
	Trouble     string       `json:"trouble,omitzero"` // of the realm file
}

// SlotStatus is one keyslot of the realm file.
type SlotStatus struct {
	ID          string `json:"id"`
	Kind        string `json:"kind"`
	Description string `json:"description,omitzero"`
}

// PolicyStatus is the policy in force.
type PolicyStatus struct {
	Digest   string    `json:"digest"`
	Loaded   time.Time `json:"loaded"`
	Services int       `json:"services"` // entries
	VMs      int       `json:"vms"`      // entries
	Rejected string    `json:"rejected,omitzero"`
}

// LibvirtStatus is the connection to the hypervisor's manager.
type LibvirtStatus struct {
	Connected bool   `json:"connected"`
	Socket    string `json:"socket,omitzero"`
	Why       string `json:"why,omitzero"`
}

// AuditStatus is the head of the audit log.
type AuditStatus struct {
	Seq     uint64 `json:"seq"`
	Hash    string `json:"hash"`
	Dropped uint64 `json:"dropped"` // records of noise that a full disk or a flood kept out
	Trouble string `json:"trouble,omitzero"`
}

// States of a VM, as status shows them.
const (
	VMWaiting  = "waiting"  // its agent has not answered yet
	VMAsking   = "asking"   // connected
	VMReleased = "released" // keys are with its receiver
	VMRefused  = "refused"
	VMGaveUp   = "gave-up" // nothing answered within the boot window
	VMOff      = "off"     // it does not run
	VMQuiet    = "quiet"   // nothing to give: restored, its vsock unplugged, or done before this broker started
)

// VMStatus is one domain that has keybroker's metadata. Of one that is off it says what the store knows.
type VMStatus struct {
	UUID        string    `json:"uuid"`
	Name        string    `json:"name"`
	Tier        string    `json:"tier"`
	CID         uint32    `json:"cid"`
	PID         int       `json:"pid"` // of its QEMU
	State       string    `json:"state"`
	Keys        []string  `json:"keys"`             // asked for, or offered by its metadata
	Sinks       []string  `json:"sinks"`            // as the agent acknowledged
	Code        string    `json:"code,omitzero"`    // of the last refusal, while it stands
	Why         string    `json:"why,omitzero"`     // likewise, with what to do
	Ticket      string    `json:"ticket"`           // as `status` says it: none, unused, presumed, used, ...
	Presumed    bool      `json:"presumed"`         // the ticket was made after a gap in the events
	Releases    int       `json:"releases"`         // in this boot
	LastRelease time.Time `json:"last_release"`     // zero: never
	Changed     time.Time `json:"changed"`          // since when the state stands
	Denied      bool      `json:"denied"`           // by `keybroker vm deny`
	Subject     string    `json:"subject,omitzero"` // an earlier UUID whose keys it inherits
	Create      []string  `json:"create,omitzero"`  // keys with which the next release may format a blank volume
}
