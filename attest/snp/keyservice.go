package snp

import (
	"fmt"
	"strings"

	"github.com/google/go-sev-guest/abi"
)

// queryNames are what AMD's key service calls the parts of a TCB (AMD's 57230, section 4.1).
var queryNames = map[string]string{"fmc": "fmcSPL", "bootloader": "blSPL", "tee": "teeSPL", "snp": "snpSPL", "microcode": "ucodeSPL"}

// VCEKPath returns under which path a key service of AMD's shape has the certificate of the VCEK that signed a report: line,
// hardware id and reported TCB. It is "" if the report does not say: those of version 2 do not name the line, others may hide
// the chip, and a VLEK's is for its provider alone.
func VCEKPath(raw []byte) string {
	r, err := parseReport(raw)
	if err != nil || r.line == nil || r.masked() || r.signer.SigningKey != abi.VcekReportSigner {
		return ""
	}
	r.setLine(r.line)
	tcb := r.tcbs[reportedTCB]
	var query []string
	for _, p := range r.line.layout {
		query = append(query, fmt.Sprintf("%s=%d", queryNames[p.name], *p.in(&tcb)))
	}
	return fmt.Sprintf("/vcek/v1/%s/%s?%s", r.line.name, hexOf(r.ChipId[:r.line.hwid]), strings.Join(query, "&"))
}

// ChainPath returns under which path such a service has the issuers of a line's VCEKs or VLEKs: kind is attest.VCEK or
// attest.VLEK.
func ChainPath(line, kind string) string {
	return fmt.Sprintf("/%s/v1/%s/cert_chain", strings.ToLower(kind), line)
}
