package snp

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/google/go-sev-guest/abi"
	spb "github.com/google/go-sev-guest/proto/sevsnp"

	"keybroker/attest"
)

// ReportSize is how many octets a report has (SNP ABI, section 7.3, table ATTESTATION_REPORT).
const ReportSize = abi.ReportSize

// ReportDataSize is how many octets of a report the guest chooses.
const ReportDataSize = abi.ReportDataSize

// versions are the layouts of reports that are known. In 2 the processor is not named, since 3 it is; 5 has the vectors of
// mitigations.
var versions = []uint32{2, 3, 5}

const (
	withCPUID       = 3 // the first version that names the processor
	withMitigations = 5 // the first version with vectors of mitigations
)

// A report is an attestation report whose octets make sense. That it is genuine is another matter.
type report struct {
	*spb.Report
	raw     []byte
	signer  abi.SignerInfo
	guest   abi.SnpPolicy
	host    abi.SnpPlatformInfo
	line    *line // nil until it is known: of version 2, from the certificate
	cpu     models
	chip    []byte // CHIP_ID; when the report hides it, the hardware id of its VCEK; nil: not known
	tcbs    map[string]attest.TCB
	malTCBs []string // the TCBs that have reserved octets
}

// The TCBs of a report (SNP ABI, section 7.3).
const (
	reportedTCB  = "reported-tcb"
	committedTCB = "committed-tcb"
	launchTCB    = "launch-tcb"
	currentTCB   = "current-tcb"
)

// isVersion reports whether a version of reports is known.
func isVersion(v uint32) bool { return slices.Contains(versions, v) }

// parseReport reads a report of a known version. Reserved bits and octets that are set, and flags that are not known, are
// errors: what they mean could be what matters.
func parseReport(raw []byte) (*report, error) {
	if len(raw) != ReportSize {
		return nil, fmt.Errorf("reading report: expected %d octets, got %d", ReportSize, len(raw))
	}
	p, err := abi.ReportToProto(raw)
	if err != nil {
		return nil, fmt.Errorf("reading report: %w", err)
	}
	r := &report{Report: p, raw: raw, chip: nonZero(p.ChipId)}
	if r.signer, err = abi.ParseSignerInfo(p.SignerInfo); err != nil {
		return nil, fmt.Errorf("reading signer: %w", err)
	}
	if r.guest, err = abi.ParseSnpPolicy(p.Policy); err != nil {
		return nil, fmt.Errorf("reading guest policy: %w", err)
	}
	if r.host, err = abi.ParseSnpPlatformInfo(p.PlatformInfo); err != nil {
		return nil, fmt.Errorf("reading platform info: %w", err)
	}
	if p.Version < withMitigations && (p.LaunchMitVector != 0 || p.CurrentMitVector != 0) {
		return nil, fmt.Errorf("reading report: expected zero in octets 0x1f8 to 0x207 of version %d", p.Version)
	}
	if p.Version >= withCPUID {
		r.line, r.cpu = lineByCPUID(r.family(), r.model())
	}
	return r, nil
}

// The processor, CPUID_FAM_ID and its neighbours: whole numbers, base and extension already added. Zero before version 3.
func (r *report) family() uint8   { return r.raw[0x188] }
func (r *report) model() uint8    { return r.raw[0x189] }
func (r *report) stepping() uint8 { return r.raw[0x18a] }

// setLine says of which line the report's processor is, so that its TCBs can be read.
func (r *report) setLine(l *line) {
	r.line = l
	r.tcbs = map[string]attest.TCB{}
	for _, t := range []struct {
		name string
		raw  uint64
	}{{reportedTCB, r.ReportedTcb}, {committedTCB, r.CommittedTcb}, {launchTCB, r.LaunchTcb}, {currentTCB, r.CurrentTcb}} {
		tcb, ok := l.layout.parse(t.raw)
		if !ok {
			r.malTCBs = append(r.malTCBs, fmt.Sprintf("%s %016x", t.name, t.raw))
		}
		r.tcbs[t.name] = tcb
	}
}

// masked reports whether the report hides which chip made it (MASK_CHIP_ID).
func (r *report) masked() bool { return isZero(r.ChipId) }

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// product describes the processor: "Genoa (Zen4c), family 19h model a0h stepping 2".
func (r *report) product() string {
	if r.Version < withCPUID {
		if r.line == nil {
			return "not said by version 2"
		}
		return r.line.name + ", by its certificate"
	}
	name := "unknown"
	if r.line != nil {
		name = r.line.name
		if r.cpu.core != "" {
			name += " (" + r.cpu.core + ")"
		}
	}
	return fmt.Sprintf("%s, family %02xh model %02xh stepping %d", name, r.family(), r.model(), r.stepping())
}

// versionOf reads only the version of a report, which needs 4 octets.
func versionOf(raw []byte) uint32 { return binary.LittleEndian.Uint32(raw) }

func hexOf(b []byte) string { return hex.EncodeToString(b) }
